"""One question to the judge through the `openai` client, and what its answer means.

The client's own retries are off: the loop must see a rate limit to slow down all calls, and must count what is charged. What a
server does not know of the optional parameters (structured output, temperature, the name of the token limit) is left out from
then on; each reply says what it was asked with. The key comes from OPENAI_API_KEY alone, and no text that leaves this module
contains it.
"""

from __future__ import annotations

import email.utils
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from alignment.errors import UserError
from alignment.evaluation.judging.cost import count_bytes, expected_usage
from alignment.evaluation.judging.prompts import RESPONSE_FORMAT, build_messages
from alignment.evaluation.judging.tasks import Task
from alignment.evaluation.judging.verdict import read_scores

KEY_VARIABLE = "OPENAI_API_KEY"

# verdict, unparsed, refused: a reply came and was charged. rate_limited, unreachable (no reply at all, may be charged), broken
# (a server's error): worth another try. rejected: the same question would be turned down again. adapted: a parameter was left
# out, ask again at once
Kind = Literal["verdict", "unparsed", "refused", "rate_limited", "unreachable", "broken", "rejected", "adapted"]


@dataclass(frozen=True)
class Reply:
    kind: Kind
    text: str = ""
    scores: tuple[float, float] | None = None
    usage: dict | None = None
    served_by: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    wait: float | None = None  # seconds, where the server says when to come back
    options: dict | None = None  # as they were sent; of a response_format its type


class JudgeStopped(UserError):
    """Nothing that is asked of this endpoint can succeed: key, permission, model name or quota."""


class JudgeClient:
    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        timeout: float,
        temperature: float,
        max_output_tokens: int,
        structured: bool,
    ):
        import openai  # takes a second, and only judging through an endpoint needs it

        self._openai = openai
        self._key = os.environ.get(KEY_VARIABLE, "")
        if not self._key.strip():
            raise UserError(
                f"{KEY_VARIABLE} is not set: export it (any text for a server that wants none); a key is never a flag"
            )
        self.model, self._timeout = model, timeout
        self._options: dict[str, Any] = {"temperature": temperature, "max_completion_tokens": max_output_tokens}
        if structured:
            self._options["response_format"] = RESPONSE_FORMAT
        self.left_out: list[str] = []  # options that the server did not take
        try:
            self._client = openai.AsyncOpenAI(api_key=self._key, base_url=base_url, timeout=timeout, max_retries=0)
        except Exception as error:  # an address that is not a URL: the HTTP library's own kinds of error
            raise UserError(f"--base_url / OPENAI_BASE_URL: {self._clean(error)}") from None
        self.address = re.sub(r"//[^/@]*@", "//", str(self._client.base_url))  # without a password in it
        if not self.address.startswith(("http://", "https://")):
            raise UserError(f"--base_url / OPENAI_BASE_URL: expected http:// or https://, got {self.address}")

    async def close(self) -> None:
        await self._client.close()

    def messages(self, task: Task) -> list[dict[str, str]]:
        as_json = "response_format" in self._options
        return build_messages(task.dimension, task.prompt, task.first_answer, task.second_answer, as_json)

    async def ask(self, task: Task) -> Reply:
        """Asks once. Raises JudgeStopped when no question can succeed."""
        options = dict(self._options)
        reply = await self._ask(self.messages(task), options)
        if "response_format" in options:
            options["response_format"] = RESPONSE_FORMAT["type"]
        return replace(reply, options=options)

    async def _ask(self, messages: list[Any], options: dict[str, Any]) -> Reply:
        try:
            answer = await self._client.chat.completions.create(model=self.model, messages=messages, **options)
        except self._openai.APIStatusError as error:
            return self._from_status(error, options)
        except self._openai.APITimeoutError:
            return Reply("unreachable", error=f"no reply within {self._timeout:g} s")
        except self._openai.APIConnectionError as error:
            return Reply("unreachable", error=f"connection failed: {self._clean(error.__cause__ or error)}")
        except (self._openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            return Reply("unreachable", error=f"the reply is broken: {self._clean(error)}")
        return self._from_answer(answer, messages, as_json="response_format" in options)

    def _from_answer(self, answer: Any, messages: list[dict], as_json: bool) -> Reply:
        try:
            choice = answer.choices[0]
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
            finish = choice.finish_reason
            if not isinstance(text, (str, type(None))):
                raise TypeError(f"content is {type(text).__name__}")
        except (AttributeError, IndexError, TypeError, KeyError) as error:  # a server that is not quite compatible
            return Reply("unreachable", error=f"the reply is no chat completion: {self._clean(error)}")
        text = self._hide_key(text or "")
        told: dict[str, Any] = {
            "text": text,
            "served_by": _text_or_none(answer.model),
            "finish_reason": _text_or_none(finish),
        }
        told["usage"] = _usage(answer) or expected_usage(count_bytes(messages), len(text) / 4) | {"estimated": True}
        if refusal or finish == "content_filter":
            return Reply("refused", error=self._clean(refusal or "content filter"), **told)
        scores = None if finish == "length" else read_scores(text, as_json)
        if scores is None:
            reason = "cut off at the token limit" if finish == "length" else "no verdict at the end"
            return Reply("unparsed", error=reason, **told)
        return Reply("verdict", scores=scores, **told)

    def _from_status(self, error: Any, options: dict) -> Reply:
        status, code, message = error.status_code, str(error.code or ""), self._clean(error.message)
        told = f"HTTP {status}: {message}"
        if re.search(r"content.?(filter|policy|management)|moderation", f"{code} {message}", re.IGNORECASE):
            return Reply("refused", error=told)
        if status == 401:
            raise JudgeStopped(f"{self.address} refused the key in {KEY_VARIABLE} (HTTP 401); mend it and run again")
        if status == 403:
            raise JudgeStopped(f"{self.address} does not permit this (HTTP 403): {message}")
        if status == 404:
            raise JudgeStopped(
                f"{self.address} has no chat completions for the model '{self.model}' (HTTP 404): {message}"
            )
        if code == "insufficient_quota" or status == 402:
            raise JudgeStopped(f"the account at {self.address} has no money left (HTTP {status}): {message}")
        if status in (400, 422):
            name = self._unknown_parameter(error, message, options)
            if name is None:
                return Reply("rejected", error=told)
            self._leave_out(name)
            return Reply("adapted", error=told)
        if status in (429, 503) and (status == 429 or _retry_after(error) is not None):
            return Reply("rate_limited", error=told, wait=_retry_after(error))
        if status in (408, 409, 425) or status >= 500:
            return Reply("broken", error=told, wait=_retry_after(error))
        return Reply("rejected", error=told)

    def _unknown_parameter(self, error: Any, message: str, options: dict) -> str | None:
        """The optional parameter of the call that the server says it does not take."""
        complaint = re.search(
            r"unsupported|not support|unknown|unrecogni|unexpected|extra (fields|inputs)|not permitted|invalid param",
            f"{error.code} {message}",
            re.IGNORECASE,
        )
        for name in options:
            if error.param == name or (complaint and name in message):
                return name
        return None

    def _leave_out(self, name: str) -> None:
        value = self._options.pop(name, None)
        if value is None:
            return  # another call found out before
        self.left_out.append(name)
        if name == "max_completion_tokens":
            self._options["max_tokens"] = value  # its older name

    def _clean(self, error: object) -> str:
        """An error as one short line, without the key, also where the server shows a part of it."""
        text = " ".join(self._hide_key(str(error)).split()) or type(error).__name__
        return re.sub(r"\b(sk|key)-[\w*.-]{3,}", "[key]", text)[:300]

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text  # "none" is no secret


def _usage(answer: Any) -> dict | None:
    usage = getattr(answer, "usage", None)
    counts = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    return counts if all(isinstance(count, int) for count in counts.values()) else None


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _retry_after(error: Any) -> float | None:
    """Seconds that the server asks to wait: milliseconds, seconds or a date, as HTTP has it."""
    headers = error.response.headers
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(float(headers[name]) / scale, 0.0)
        except (KeyError, ValueError):
            continue
    try:
        return max(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, ValueError, TypeError):
        return None
