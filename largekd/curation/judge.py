"""What a judge model said about an answer, as a verdict."""

import json
import re

from largekd.curation.markings import find_thought
from largekd.curation.records import Verdict

_WORDS = {
    **dict.fromkeys(("correct", "right", "yes", "true", "pass"), "right"),
    **dict.fromkeys(("incorrect", "wrong", "no", "false", "fail", "not correct"), "wrong"),
    **dict.fromkeys(("unknown", "unsure", "undecided", "cannot tell"), "unknown"),
}
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_MARKED = re.compile(
    rf"(?<!['“])(?:verdict|judge?ment|decision|grade|conclusion)[\"'*_ \t]*(?:[:=]|\bis\b)[\"'*_ \t\n\[<(]*"
    rf"(?:\\boxed\{{)?({_WORD})\b",
    re.IGNORECASE,
)
_BRACKETED = re.compile(rf"(?:\[\[|\\boxed\{{(?:\\text\{{)?)[ \t]*({_WORD})[ \t]*\}}?(?:\]\]|\}})", re.IGNORECASE)
# "Verdict: correct or incorrect", "correct?", "correct reasoning but" are no verdict of right.
_SAID = re.compile(
    r"[\"'*_\])}>`]{0,9}[ \t]{0,9}(?:$|[.;!]|,(?![ \t]{0,9}but\b)|(?<=[ \t])[-–—]|because\b|since\b)",
    re.IGNORECASE | re.MULTILINE,
)
_ALONE = re.compile(rf"[\W_]*({_WORD})(?:[^\w?]|_)*", re.IGNORECASE)


def judge_verdict(text: str, /, *, finish: str = "stop") -> Verdict:
    """The verdict in a judge's text: a last line of one word, else the last mark ("Verdict: correct", [[correct]]).

    A text that was cut off, names no verdict, hedges it, or ends its thought without one, is unknown. What the judge
    thinks aloud or quotes does not count.
    """
    thought = find_thought(text)
    if thought is not None:
        text = text[thought.after :] if thought.after is not None else ""
    if finish != "stop":
        return Verdict("unknown", "judge", "the judge's text is not finished")
    word = _last_line(text)
    if word is None:
        marked = [match for pattern in (_MARKED, _BRACKETED) for match in pattern.finditer(text)]
        if not marked:
            return Verdict("unknown", "judge", "the judge's text holds no verdict")
        last = max(marked, key=re.Match.start)
        word = last[1]
        if _WORDS[word.lower()] == "right" and not _SAID.match(text, last.end()):
            return Verdict("unknown", "judge", "the judge's verdict is hedged")
    quoted = json.dumps(" ".join(text.split())[-200:], ensure_ascii=False)
    match _WORDS[word.lower()]:
        case "right":
            return Verdict("right", "judge", quoted)
        case "wrong":
            return Verdict("wrong", "judge", quoted)
        case _:
            return Verdict("unknown", "judge", quoted)


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    found = _ALONE.fullmatch(lines[-1]) if lines else None
    return found[1] if found else None
