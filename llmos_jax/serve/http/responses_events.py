"""The typed events of a response as its output grows (https://platform.openai.com/docs/api-reference/responses-streaming)."""

from collections.abc import Iterator
from typing import Any

from llmos_jax.serve.http.answers import Answers
from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.responses_schemas import (
    FunctionCall,
    Incomplete,
    InputDetails,
    OutputMessage,
    OutputText,
    Response,
    ResponseUsage,
)
from llmos_jax.serve.http.streams import event
from llmos_jax.serve.http.tools import Call

Data = dict[str, Any]


class Writer:
    """Grows `response` and tells each growth as events. number: of the next event."""

    def __init__(self, response: Response):
        self.response, self.number = response, 0
        self._message: OutputMessage | None = None  # the one that texts go to

    def begin(self) -> Iterator[Data]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response.model_dump(mode="json"))

    def text(self, text: str) -> Iterator[Data]:
        if self._message is None:
            yield from self._open_message()
        assert self._message is not None
        self._message.content[0].text += text
        yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def call(self, call: Call) -> Iterator[Data]:
        yield from self._close_message("completed")
        number = len(self.response.output)
        item = FunctionCall(
            id=f"fc_{self._id(number)}", call_id=call.id, name=call.name, arguments="", status="in_progress"
        )
        yield self._event("response.output_item.added", output_index=number, item=item.model_dump())
        place = {"item_id": item.id, "output_index": number}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        told = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **told)
        item = item.model_copy(update={"arguments": call.arguments, "status": "completed"})
        self.response.output.append(item)
        yield self._event("response.output_item.done", output_index=number, item=item.model_dump())

    def end(self, cut: bool, answers: Answers) -> Iterator[Data]:
        """cut: the answer ended because it had all the tokens it might have."""
        if not self.response.output:
            yield from self._open_message()
        yield from self._close_message("incomplete" if cut else "completed")
        self.response.status = "incomplete" if cut else "completed"
        self.response.incomplete_details = Incomplete(reason="max_output_tokens") if cut else None
        self.response.usage = ResponseUsage(
            input_tokens=answers.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=answers.cached_tokens),
            output_tokens=answers.completion_tokens,
            total_tokens=answers.prompt_tokens + answers.completion_tokens,
        )
        yield self._event(f"response.{self.response.status}", response=self.response.model_dump(mode="json"))

    def failed(self, error: ApiError) -> str:
        """The event that ends a stream in which something went wrong."""
        told = {"code": error.code or error.type, "message": error.message, "param": error.param}
        return event(self._event("error", **told), "error")

    def _open_message(self) -> Iterator[Data]:
        number = len(self.response.output)
        self._message = OutputMessage(id=f"msg_{self._id(number)}", status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=number, item=self._message.model_dump())
        part = OutputText(text="")
        self._message.content.append(part)
        self.response.output.append(self._message)
        yield self._event("response.content_part.added", **self._place(), part=part.model_dump())

    def _close_message(self, status: Any) -> Iterator[Data]:
        if self._message is None:
            return
        place, part = self._place(), self._message.content[0]
        self._message.status = status
        yield self._event("response.output_text.done", **place, text=part.text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=part.model_dump())
        item, number = self._message.model_dump(), place["output_index"]
        yield self._event("response.output_item.done", output_index=number, item=item)
        self._message = None

    def _place(self) -> Data:
        assert self._message is not None
        return {"item_id": self._message.id, "output_index": len(self.response.output) - 1, "content_index": 0}

    def _id(self, number: int) -> str:
        return f"{self.response.id.removeprefix('resp_')}{number:02d}"

    def _event(self, kind: str, **data: Any) -> Data:
        told = {"type": kind, "sequence_number": self.number, **data}
        self.number += 1
        return told
