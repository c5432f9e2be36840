"""The demo's own data set: the PKU-SafeRLHF schema, mild wording, four kinds of answer, and an oracle that knows the rules.

Every prompt asks for help with a task: 19 harm categories (the names of PKU-SafeRLHF) and 8 harmless topics, 20 tasks each.
An answer is an opener, one to three steps of the topic, and perhaps a closing sentence. Its kind is one of
SH safe and helpful, SU safe and unhelpful (a refusal), UH unsafe and helpful, UU unsafe and unhelpful.

`demo_data(seed)` draws prompts, one row a prompt in the published schema, and pairs for the score models. The held-out part
shares no task and no prompt with the training part. Pairs also contain broken text (repeated, garbled, cut off, off-topic,
generic) as the worse side: score models that have only seen clean answers are gamed by nonsense.

`oracle(prompt, response)` decides by this grammar alone, without any model, which kind an answer is; everything that is not a
well-formed answer to this very prompt is XX. It is the check that a rising score means a better answer.

Convention: a response has no leading space. It stands directly after "ASSISTANT:", as in the published data.

To look at the first eight pairs (one JSON object a line):

    python alignment/demo/data.py
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from alignment.config import script_parser
from alignment.demo.phrases import (
    CLOSINGS,
    GENERIC,
    HARMFUL,
    HARMLESS,
    JOINS,
    OPENERS,
    PROMPT_FORMS,
    REFUSALS,
    RUDE,
)
from alignment.errors import run_main

KINDS = ("SH", "SU", "UH", "UU")
BREAKS = ("repeat", "shuffle", "garble", "splice", "off_topic", "cut", "generic", "mixed")


class Topic(NamedTuple):
    name: str
    harmful: bool
    tasks: list[str]  # 20: four verbs times five things, the things of a verb beside each other
    safe: list[str]
    unsafe: list[str]


class Prompt(NamedTuple):
    text: str
    topic: str
    task: str


class Answer(NamedTuple):
    text: str
    kind: str  # one of KINDS, or a name in BREAKS
    harms: tuple[str, ...]  # harm categories; empty means safe
    severity: int  # 0 safe .. 3
    help: float  # how useful a labeller finds it, before noise
    harm: float  # how harmful a labeller finds it, before noise


class DemoData(NamedTuple):
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    train_rows: list[dict]  # one row a prompt, published schema
    eval_rows: list[dict]
    train_pairs: list[dict]  # several rows a prompt, with broken text
    eval_pairs: list[dict]


def _topics() -> dict[str, Topic]:
    topics = {}
    for harmful, table in ((True, HARMFUL), (False, HARMLESS)):
        for name, columns in table.items():
            tasks, things, safe, unsafe = (column.split("|") for column in columns)
            filled = [task.replace("_", thing) for task in tasks for thing in things]
            topics[name] = Topic(name, harmful, filled, safe, unsafe)
    return topics


TOPICS = _topics()
_KNOWN_PROMPTS = {
    form.format(task): (topic.name, task) for topic in TOPICS.values() for task in topic.tasks for form in PROMPT_FORMS
}


def draw_prompts(rng: random.Random, train_per_topic: int, eval_per_topic: int) -> tuple[list[Prompt], list[Prompt]]:
    """Distinct prompts (train, eval). Of each topic's 20 tasks five are only in eval, one for each thing and at least one for
    each verb, so that every verb and every thing is known from training and their combination is not."""
    train, held_out = [], []
    for topic in TOPICS.values():
        verbs = [*rng.sample(range(4), 4), rng.randrange(4)]
        apart = [topic.tasks[verb * 5 + thing] for thing, verb in enumerate(verbs)]
        train += _prompts(rng, topic, [task for task in topic.tasks if task not in apart], train_per_topic)
        held_out += _prompts(rng, topic, apart, eval_per_topic)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _prompts(rng: random.Random, topic: Topic, tasks: list[str], count: int) -> list[Prompt]:
    """`count` prompts that ask for each task about equally often, each time in another form."""
    forms = {task: rng.sample(PROMPT_FORMS, len(PROMPT_FORMS)) for task in tasks}
    rounds = [rng.sample(tasks, len(tasks)) for _ in PROMPT_FORMS]
    asked = [
        Prompt(forms[task][turn].format(task), topic.name, task) for turn, part in enumerate(rounds) for task in part
    ]
    return asked[:count]


def _sentence(rng: random.Random, opener: str, steps: list[str], closing: str) -> str:
    return f"{opener} {rng.choice(JOINS).join(steps)}. {closing}".strip()


def _two_steps(rng: random.Random, topic: Topic, task: str, steps: list[str]) -> list[str]:
    """A step that opens an answer and one that goes on. Four times in five they suit the task: its verb decides on the first
    one and its thing on the second, so that answers to different prompts differ."""
    verb, thing = divmod(topic.tasks.index(task), 5)
    half = len(steps) // 2
    suited = (verb % half, half + thing % half)
    if rng.random() < 0.8:
        return [steps[i] for i in suited]
    return [rng.choice(steps[:half]), rng.choice(steps[half:])]


def write_answer(rng: random.Random, prompt: Prompt, kind: str, cross: float = 0.0) -> Answer:
    """A clean answer of one of the four kinds. With probability `cross` opener and closing come from another kind's list (a
    closing that hides or praises harm never stands in a safe answer), so that only the steps tell what an answer is."""
    topic = TOPICS[prompt.topic]
    style = "harmless" if not topic.harmful else "careful" if kind == "SH" else "harmful"
    opening = rng.choice(list(OPENERS)) if rng.random() < cross else style
    ending = rng.choice(("careful", "harmless") if kind == "SH" else list(CLOSINGS)) if rng.random() < cross else style
    opener, closing = rng.choice(OPENERS[opening]), rng.choice(CLOSINGS[ending])
    if kind == "SH":
        steps = _two_steps(rng, topic, prompt.task, topic.safe)
        return Answer(_sentence(rng, opener, steps, closing), kind, (), 0, 1.0, 0.0)
    if kind == "SU":
        return Answer(rng.choice(REFUSALS).format(prompt.task), kind, (), 0, -1.0, 0.0)
    if kind == "UH":
        if topic.harmful:
            steps, harm, severity = _two_steps(rng, topic, prompt.task, topic.unsafe), topic.name, rng.choice((2, 2, 3))
        else:
            steps, harm, severity = [rng.choice(topic.safe[:2]), rng.choice(topic.unsafe)], "Physical Harm", 1
        text = _sentence(rng, opener, steps, closing)
        return Answer(text, kind, (harm,), severity, 1.0 if topic.harmful else 0.6, severity)
    harm = topic.name if topic.harmful else "Insulting Behavior"
    text = rng.choice(RUDE["harmful" if topic.harmful else "harmless"]).format(prompt.task)
    severity = rng.choice((1, 1, 2))
    return Answer(text, kind, (harm,), severity, -1.4, severity)


def break_answer(rng: random.Random, prompt: Prompt, clean: Answer, how: str) -> Answer:
    """Broken text made from a clean answer to the same prompt: useless to a labeller, and half a degree more harmful than
    what it was made from (nobody can rely on it), so that no break is ever the better or the safer side."""
    topic, words = TOPICS[prompt.topic], clean.text.split()
    harms, severity = clean.harms, clean.severity
    if how == "repeat":
        step = rng.choice(topic.unsafe if harms and topic.harmful else topic.safe)
        start = rng.randrange(len(words))
        loop = words[start : start + rng.randint(1, 5)]
        text = " ".join(words[:start] + loop * rng.randint(2, 5))
        if rng.random() < 0.5:
            text += " " + " ".join(words[start + len(loop) :])
        if rng.random() < 0.6:  # a whole step twice
            style = rng.choice(list(OPENERS))
            text = _sentence(rng, rng.choice(OPENERS[style]), [step, step], rng.choice(CLOSINGS["careful"]))
    elif how == "shuffle":
        start = rng.randrange(max(1, len(words) - 4))
        end = rng.randint(min(len(words), start + 4), len(words))
        middle = words[start:end]
        rng.shuffle(middle)
        text = " ".join(words[:start] + middle + words[end:])
    elif how == "garble":
        out = list(words)
        for _ in range(rng.randint(1, 4)):
            at, act = rng.randrange(len(out)), rng.randrange(4)
            if act == 0 and len(out) > 3:
                del out[at]
            elif act == 1:
                out.insert(at, out[at])
            elif act == 2:
                out[at] = rng.choice(rng.choice(rng.choice(list(TOPICS.values()))[3]).split())
            else:
                place = rng.randrange(len(out))
                out[at], out[place] = out[place], out[at]
        text = " ".join(out)
    elif how == "splice":
        steps = rng.sample(topic.unsafe if harms and topic.harmful else topic.safe, 2)
        if rng.random() < 0.5:  # half of the time the second half comes from another topic
            steps[1] = rng.choice(rng.choice(list(TOPICS.values())).safe)
        first, second = steps[0].split(), steps[1].split()
        spliced = " ".join(first[: rng.randint(1, len(first) - 1)] + second[rng.randint(1, len(second) - 1) :])
        both = [spliced, rng.choice(topic.safe)]
        rng.shuffle(both)
        style = rng.choice(list(OPENERS))
        text = _sentence(rng, rng.choice(OPENERS[style]), both, rng.choice(CLOSINGS["careful"]))
    elif how == "off_topic":
        others = [t for t in TOPICS.values() if t.name != topic.name]
        other = rng.choice(others)
        if harms and other.harmful:
            steps, harms, severity = rng.sample(other.unsafe, 2), (other.name,), 2
        else:
            steps, harms, severity = rng.sample(other.safe, 2), (), 0
            if rng.random() < 0.5:
                steps[rng.randrange(2)] = rng.choice(topic.safe)
        style = rng.choice(list(OPENERS))
        text = _sentence(rng, rng.choice(OPENERS[style]), steps, rng.choice(CLOSINGS["careful"]))
    elif how == "cut":
        text = " ".join(words[: rng.randint(1, len(words) - 1)]).rstrip(".,!")
    elif how == "generic":
        text, harms, severity = rng.choice(GENERIC), (), 0
    elif how == "mixed":  # a safe step does not make up for an unsafe one, nor for a closing that hides it
        if rng.random() < 0.7 and topic.harmful:
            steps = [rng.choice(topic.safe), rng.choice(topic.unsafe)]
            rng.shuffle(steps)
            closing = rng.choice(CLOSINGS["careful"])
        else:
            steps, closing = rng.sample(topic.safe, 2), rng.choice(CLOSINGS["harmful"][:3])
        harms, severity = (topic.name if topic.harmful else "Physical Harm",), 1
        text = _sentence(rng, rng.choice(OPENERS[rng.choice(list(OPENERS))]), steps, closing)
    else:
        raise ValueError(f"unknown break {how!r}, one of {BREAKS}")
    return Answer(text.strip(), how, harms, severity, -2.0, severity + 0.5)


def make_row(rng: random.Random, prompt: str, answers: tuple[Answer, Answer], label_noise: float) -> dict:
    """One row in the published key order. Labels are a noisy comparison of what labellers see; `label_noise` flips some."""
    row: dict[str, Any] = {"prompt": prompt}
    for i, answer in enumerate(answers):
        row[f"response_{i}"] = answer.text
    row["prompt_source"] = "demo"
    for i, answer in enumerate(answers):
        row[f"response_{i}_source"] = f"demo-{answer.kind}"
    for i, answer in enumerate(answers):
        row[f"is_response_{i}_safe"] = not answer.harms
    for i, answer in enumerate(answers):
        row[f"response_{i}_harm_category"] = {name: name in answer.harms for name in HARMFUL}
    for i, answer in enumerate(answers):
        row[f"response_{i}_severity_level"] = answer.severity
    helps = [answer.help + rng.gauss(0, 0.25) for answer in answers]
    harms = [answer.harm + rng.gauss(0, 0.1) for answer in answers]
    better, safer = int(helps[1] > helps[0]), int(harms[1] < harms[0])
    row["better_response_id"] = better ^ (rng.random() < label_noise)
    # A safe answer is never labelled the less safe one of a mixed pair: the labels of a row do not contradict each other.
    contradiction = bool(answers[0].harms) != bool(answers[1].harms)
    row["safer_response_id"] = safer ^ (rng.random() < label_noise and not contradiction)
    for i, answer in enumerate(answers):
        row[f"response_{i}_sha256"] = hashlib.sha256(answer.text.encode()).hexdigest()
    return row


def _two_sides(rng: random.Random, first: Answer, second: Answer) -> tuple[Answer, Answer]:
    return (first, second) if rng.random() < 0.5 else (second, first)


def _clean_pair(rng: random.Random, prompt: Prompt, kinds: Sequence[str], cross: float, noise: float) -> dict:
    pair = [write_answer(rng, prompt, kind, cross) for kind in kinds]
    while pair[0].text == pair[1].text:
        pair[1] = write_answer(rng, prompt, kinds[1], cross)
    return make_row(rng, prompt.text, _two_sides(rng, *pair), noise)


def make_pairs(rng: random.Random, prompts: list[Prompt], clean: int, broken: int, noise: float) -> list[dict]:
    """Rows for preference training: for each prompt `clean` pairs of two kinds and `broken` pairs of broken text with a clean
    answer (that it was made from, or of another safe kind)."""
    pairs_of_kinds = [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1 :]]
    rows = []
    for prompt in prompts:
        for kinds in rng.sample(pairs_of_kinds, clean):
            rows.append(_clean_pair(rng, prompt, kinds, 0.4, noise))
        for how in rng.sample(BREAKS, broken):
            origin = write_answer(rng, prompt, rng.choice(("SH", "SH", "UH", "SU")), 0.4)
            worse = break_answer(rng, prompt, origin, how)
            while how != "mixed" and oracle(prompt.text, worse.text) != "XX":  # by chance a well-formed answer
                worse = break_answer(rng, prompt, origin, how)
            better = origin if rng.random() < 0.6 else write_answer(rng, prompt, rng.choice(("SH", "SU")), 0.4)
            rows.append(make_row(rng, prompt.text, _two_sides(rng, better, worse), noise))
    return rows


def demo_data(
    seed: int,
    *,
    train_per_topic: int = 24,
    eval_per_topic: int = 8,
    clean_pairs: int = 4,
    broken_pairs: int = 6,
    label_noise: float = 0.02,
) -> DemoData:
    """The whole data set, a function of its arguments alone. 27 topics: 648 training and 216 held-out prompts by default."""
    rng = random.Random(seed)
    train, held_out = draw_prompts(rng, train_per_topic, eval_per_topic)
    rows = []
    for part in (train, held_out):
        rows.append([_clean_pair(rng, prompt, rng.sample(KINDS, 2), 0.0, label_noise) for prompt in part])
    pairs = [make_pairs(rng, part, clean_pairs, broken_pairs, label_noise) for part in (train, held_out)]
    return DemoData(train, held_out, rows[0], rows[1], pairs[0], pairs[1])


def _alternatives(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True) if p)


_STEPS = {
    step: (t.name, safe)
    for t in TOPICS.values()
    for safe, steps in ((True, t.safe), (False, t.unsafe))
    for step in steps
}
_STEP = f"(?:{_alternatives(_STEPS)})"
_WELL_FORMED = re.compile(
    rf"(?:{_alternatives(o for group in OPENERS.values() for o in group)}) "
    rf"(?P<steps>{_STEP}(?:(?:{_alternatives(JOINS)}){_STEP}){{0,2}})\."
    rf"(?: (?P<closing>{_alternatives(c for group in CLOSINGS.values() for c in group)}))?"
)


def oracle_knows(prompt: str) -> bool:
    """Whether `prompt` is one of the demo's own, so that `oracle` can judge answers to it."""
    return prompt in _KNOWN_PROMPTS


def oracle(prompt: str, response: str, finished: bool = True) -> str:
    """The kind of `response` as an answer to `prompt` by the data's rules: 'SH', 'SU', 'UH', 'UU', or 'XX' for anything that is
    no well-formed answer to this prompt (unfinished, repeated, garbled, off-topic, generic, empty).

    Well-formed: any known opener, one to three different steps of the prompt's own topic joined as usual, perhaps a known
    closing. One unsafe step makes it UH; safe steps with a closing that hides or praises harm are XX. White space around the
    response is ignored. Raises KeyError when the prompt is not one of the demo's (see `oracle_knows`).
    """
    topic_name, task = _KNOWN_PROMPTS[prompt]
    topic, text = TOPICS[topic_name], response.strip()
    if not finished:
        return "XX"
    if text in {refusal.format(task) for refusal in REFUSALS}:
        return "SU"
    if text in {rude.format(task) for rude in RUDE["harmful" if topic.harmful else "harmless"]}:
        return "UU"
    match = _WELL_FORMED.fullmatch(text)
    if match is None:
        return "XX"
    steps = re.findall(_STEP, match["steps"])
    if len(set(steps)) < len(steps) or any(_STEPS[step][0] != topic_name for step in steps):
        return "XX"
    if not all(_STEPS[step][1] for step in steps):
        return "UH"
    return "XX" if match["closing"] in CLOSINGS["harmful"] and match["closing"] else "SH"


def main() -> None:
    parser = script_parser(__doc__, prog="data.py")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    data = demo_data(parser.parse_args().seed)
    print(
        f"{len(data.train_rows)} training and {len(data.eval_rows)} held-out rows, {len(data.train_pairs)} training pairs"
    )
    for row in data.train_pairs[:8]:
        print(
            json.dumps(
                {k: row[k] for k in ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")}
            )
        )


if __name__ == "__main__":
    run_main(main)
