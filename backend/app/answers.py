"""What the server answered lately, by request id: nothing of a photo or of who sent it."""

from collections import OrderedDict, deque
from dataclasses import dataclass

from app.ml.drift import AnswerSummary, sum_up

REMEMBERED = 1000


class UnknownAnswerError(LookupError):
    """A request id whose answer is not remembered."""


@dataclass(frozen=True)
class Answer:
    """One answer to a photo."""

    model_version: int
    class_name: str
    confidence: float
    verdict: str


class RecentAnswers:
    """The last answers; use it from one event loop."""

    def __init__(self) -> None:
        self._by_request: OrderedDict[str, Answer] = OrderedDict()
        self._last: deque[Answer] = deque(maxlen=REMEMBERED)  # clients may repeat request ids

    def add(self, request_id: str, answer: Answer) -> bool:
        """Remember an answer; return whether it is another than the last one under this id.

        Whoever asks about a photo again, as the page does to see where the network looked, or
        after a lost connection, gives the id of the first answer.
        """
        is_new = self._by_request.pop(request_id, None) != answer
        self._by_request[request_id] = answer
        if is_new:
            self._last.append(answer)
        if len(self._by_request) > REMEMBERED:
            self._by_request.popitem(last=False)
        return is_new

    def to(self, request_id: str) -> Answer:
        """Look an answer up.

        Raises:
            UnknownAnswerError: it was never given, or is no longer remembered.
        """
        try:
            return self._by_request[request_id]
        except KeyError:
            raise UnknownAnswerError(
                f"no answer with the request id {request_id[:64]!r} is among the last "
                f"{REMEMBERED:,}; leave the id out, or ask about the photo again"
            ) from None

    def summary(self, model_version: int) -> AnswerSummary | None:
        """Sum up the last answers of a version; None if it gave none."""
        given = [answer for answer in self._last if answer.model_version == model_version]
        if not given:
            return None
        return sum_up([answer.confidence for answer in given], [a.verdict for a in given])
