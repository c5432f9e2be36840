// The drawer with one prompt and the answers of all models side by side, and lists whose rows open it.

const detail = { steps: null, place: 0, back: null, extra: null, onchange: () => {} };

/**
 * Opens the drawer on the point steps[place]; "previous" and "next" walk through `steps`. `extra(place)` may give a node to
 * stand between prompt and answers.
 */
function openPoint(place, steps, extra = null) {
  Object.assign(detail, { place, steps, extra });
  detail.back ??= document.activeElement;
  showDetail();
}

function closeDetail() {
  byId("detail").hidden = true;
  document.documentElement.classList.remove("with-detail");
  detail.steps = null;
  detail.onchange([]);
  if (detail.back) detail.back.focus({ preventScroll: true });
  detail.back = null;
}

function step(by) {
  detail.place = Math.min(Math.max(detail.place + by, 0), detail.steps.length - 1);
  showDetail();
}

function showDetail() {
  if (!detail.steps) return;
  const point = detail.steps[detail.place];
  const prompt = points.prompt[point];
  const drawer = byId("detail");
  const answers = prompt < 0 ? [point] : answersTo(prompt);
  const place = detail.steps.length > 1 ? count(detail.place + 1) + " of " + count(detail.steps.length) : "";
  const head = el(
    "div",
    { class: "head" },
    el("strong", null, prompt < 0 ? "An answer without text" : "Prompt " + count(prompt + 1)),
    el("span", { class: "faint" }, place),
    el("button", { type: "button", id: "previous", disabled: detail.place === 0, onclick: () => step(-1) }, "‹ previous"),
    el("button", { type: "button", id: "next", disabled: detail.place + 1 >= detail.steps.length, onclick: () => step(1) }, "next ›"),
    el("button", { type: "button", onclick: () => drawer.classList.toggle("tall") }, "Taller"),
    el("button", { type: "button", id: "close", onclick: closeDetail }, "Close (Esc)"),
  );
  const parts = [head];
  if (prompt < 0) {
    parts.push(el("p", null, "The points file of this model is shorter than its scores, so prompt and answer of this point are not known."));
  } else {
    const categories = data.prompt_categories[prompt].map((c) => data.categories[c]).join(", ");
    if (categories) parts.push(el("p", { class: "faint" }, categories));
    parts.push(folded(texts.prompts[prompt], !view.promptsShown, "prompt", filters.where === "response" ? "" : filters.needle));
  }
  if (detail.extra) parts.push(detail.extra(detail.place));
  const absent = data.models.filter((_, m) => !answers.some((i) => points.model[i] === m)).map((model) => model.name);
  if (absent.length && prompt >= 0) parts.push(el("p", { class: "faint" }, "No saved answer: " + absent.join(", ")));
  parts.push(el("div", { class: "cards" }, ...answers.map((i) => card(i, i === point))));
  const focused = drawer.contains(document.activeElement) ? document.activeElement.id : null;
  drawer.replaceChildren(...parts);
  if (drawer.hidden || focused === null) drawer.scrollTop = 0;
  const opened = drawer.hidden;
  drawer.hidden = false;
  document.documentElement.classList.add("with-detail");
  if (opened) drawer.focus({ preventScroll: true });
  else if (focused && byId(focused)) (byId(focused).disabled ? drawer : byId(focused)).focus({ preventScroll: true });
  detail.onchange(answers, point);
}

function answersTo(prompt) {
  const own = answerAt.subarray(prompt * NUM_MODELS, (prompt + 1) * NUM_MODELS);
  return [...own].filter((i) => i >= 0);
}

function card(i, chosen) {
  const m = points.model[i];
  const flags = data.flags.filter((_, bit) => points.flags[i] & (1 << bit));
  const head = el("header", null, dot(modelColour(m)), el("strong", null, data.models[m].name), " ", quadrantTag(points.quadrant[i]));
  const facts = ["R " + number(points.reward[i]), "C " + number(points.cost[i])];
  if (points.words[i] !== null) facts.push(points.words[i] + " words");
  const parts = [head, el("small", null, [...facts, ...flags].join(" · "))];
  if (data.errors[i]) parts.push(el("p", { class: "faint" }, "no score: " + data.errors[i]));
  const text = texts.responses[i];
  if (text === null) parts.push(el("p", { class: "faint" }, "text not saved"));
  else parts.push(folded(text, isUnsafe(i) && !view.unsafeUnfolded, "answer", filters.where === "prompt" ? "" : filters.needle));
  return el("article", { class: chosen ? "card chosen" : "card" }, ...parts);
}

/** A text, behind a click where it may do harm. What is folded enters the page when it is opened. */
function folded(text, isFolded, kind, needle) {
  const body = () => el("div", { class: "plain", dir: "auto" }, ...(text === "" ? [el("em", { class: "faint" }, "empty")] : highlighted(text, needle)));
  if (!isFolded) return body();
  const words = text.split(/\s+/).filter(Boolean).length;
  const label = kind === "prompt" ? "prompt" : "unsafe or unscored answer";
  const box = el("details", null, el("summary", null, "show " + label + ", " + words + " words"));
  box.addEventListener("toggle", () => box.open && box.children.length === 1 && box.append(body()));
  return box;
}

function promptLine(prompt, needle) {
  if (prompt < 0) return el("span", { class: "text faint" }, "text not saved");
  if (!view.promptsShown) return el("span", { class: "text faint" }, "prompt " + count(prompt + 1) + " (hidden)");
  return el("span", { class: "text", dir: "auto" }, ...highlighted(texts.prompts[prompt].slice(0, 300), needle));
}

const lists = [];

/** A list in pages of 50. `row(item)` gives a row's content, `open(place, items)` is what choosing one does. */
function pagedList(container, row, open) {
  const SIZE = 50;
  const list = { items: [], page: 0 };
  list.draw = () => {
    const pages = Math.max(Math.ceil(list.items.length / SIZE), 1);
    const shown = list.items.slice(list.page * SIZE, (list.page + 1) * SIZE);
    const turn = (by) => () => {
      list.page += by;
      list.draw();
    };
    const rows = shown.map((item, k) =>
      el("li", null, el("button", { type: "button", onclick: (event) => choose(event, list.page * SIZE + k) }, ...row(item))),
    );
    container.replaceChildren(
      el("div", { class: "pager" },
        el("button", { type: "button", disabled: list.page === 0, onclick: turn(-1), "aria-label": "previous page" }, "‹"),
        el("span", { class: "faint" }, list.items.length ? "page " + (list.page + 1) + " of " + pages : "nothing"),
        el("button", { type: "button", disabled: list.page + 1 >= pages, onclick: turn(1), "aria-label": "next page" }, "›")),
      el("ol", { class: "rows", onkeydown: walk, hidden: !rows.length }, ...rows),
    );
  };
  const choose = (event, place) => {
    container.querySelectorAll("[aria-current]").forEach((other) => other.removeAttribute("aria-current"));
    event.currentTarget.setAttribute("aria-current", "true");
    detail.back = event.currentTarget;
    open(place, list.items);
  };
  list.set = (items) => {
    list.items = items;
    list.page = 0;
    list.draw();
  };
  lists.push(list);
  return list;
}

/** Up and Down walk through the rows of a list. */
function walk(event) {
  const by = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  const row = by && event.target.closest("li")[by];
  if (!row) return;
  event.preventDefault();
  row.querySelector("button").focus();
}
