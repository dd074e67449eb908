"""What a model wrote, taken apart: thought, steps, final answer, program.

Everything that is returned is a piece of the text, character by character. Nothing is computed, completed or guessed.
"""

import re
from typing import Literal

from largekd.config.curation import CurationConfig
from largekd.curation.final_answers import AUTO, FINDERS, LONGEST, Found, cleaned, find_answer
from largekd.curation.markings import Fence, Piece, Thought, find_fences, find_program, find_thought, trimmed, without
from largekd.curation.records import Parsed
from largekd.curation.steps import split_steps

# "So, the final answer is:" above a displayed formula.
_ANNOUNCES = re.compile(r"\b(?:answer|therefore|thus|hence|result|so)\b", re.IGNORECASE)
CUT_OFF = "cut off at the token limit"


def parse(text: str, /, *, finish: Literal["stop", "length", "failed"], config: CurationConfig) -> Parsed:
    """What `text` holds; `problem` says what is missing.

    reasoning: the thought, or what stands before the final answer. answer: looked for after the thought, outside of
    programs, by `config.answer_format`; the last one counts. program: the last whole block of Python. Of a text that
    was cut off, only what is certainly whole is kept, and `problem` is always set.
    """
    if finish == "failed" or not text.strip():
        return Parsed(problem="nothing was written")
    cut = finish == "length"
    thought = find_thought(text)
    if thought is not None and thought.after is None and cut:
        reasoning = thought.inner.of(text) or None
        return Parsed(reasoning, _steps(reasoning, cut=True), problem=f"{CUT_OFF}, inside the thought")
    start = thought.after if thought is not None and thought.after is not None else 0
    fences = tuple(_moved(fence, by=start) for fence in find_fences(text[start:]))
    program = find_program(text, fences, cut=cut)
    found = _answer(text, start=start, fences=fences, format=config.answer_format, cut=cut)
    reasoning = _reasoning(
        text, thought=thought, start=start, found=found, program=program, format=config.answer_format
    )
    return Parsed(
        reasoning=reasoning,
        steps=_steps(reasoning, cut=cut and found is None),
        answer=None if found is None else found.piece.of(text),
        program=None if program is None else program.body.of(text),
        problem=_problem(text, start=start, config=config, cut=cut, answered=bool(found or program)),
    )


def _moved(fence: Fence, *, by: int) -> Fence:
    body, whole = (Piece(piece.start + by, piece.end + by) for piece in (fence.body, fence.whole))
    return Fence(fence.language, body, whole, fence.closed)


def _answer(text: str, *, start: int, fences: tuple[Fence, ...], format: str, cut: bool) -> Found | None:
    code = _code(fences)
    visible = without(text, code)[start:]
    found = find_answer(visible, format=format, cut=cut, alone=not code)
    if found is None:
        return None
    piece = Piece(found.piece.start + start, found.piece.end + start)
    # Blanked code inside of an answer would come back with the text.
    if any(fence.whole.start < piece.end and piece.start < fence.whole.end for fence in code):
        return None
    return Found(piece, found.mark + start, found.closed)


def _code(fences: tuple[Fence, ...]) -> tuple[Fence, ...]:
    """Blocks that hold no answer."""
    return tuple(fence for fence in fences if fence.language not in ("json", "text", "latex", "math", "tex"))


def _reasoning(
    text: str, *, thought: Thought | None, start: int, found: Found | None, program: Fence | None, format: str
) -> str | None:
    if thought is not None and thought.inner.start < thought.inner.end:
        end = thought.inner.end
        if found is not None and thought.after is None:
            # A thought that was never closed holds its own answer.
            end = _start_of_sentence(text, start=thought.inner.start, mark=found.mark)
        return trimmed(text, thought.inner.start, max(end, thought.inner.start)).of(text) or None
    if format == "none" and program is None:
        return None
    end = found.mark if found is not None else program.whole.start if program is not None else len(text)
    if found is not None:
        end = _start_of_sentence(text, start=start, mark=end)
    return trimmed(text, start, end).of(text) or None


def _start_of_sentence(text: str, *, start: int, mark: int) -> int:
    """Where the sentence or line with the answer's mark begins."""
    line = max(start, text.rfind("\n", start, mark) + 1)
    breaks = [match.end() for match in re.finditer(r"[.!?][ \t]+", text[line:mark])]
    if breaks:
        return line + breaks[-1]
    before = text[start:line].rstrip()
    for opener in ("\\[", "$$"):
        before = before.removesuffix(opener).rstrip()
    last = before.rfind("\n") + 1
    announces = before.rstrip("*_").endswith(":") and _ANNOUNCES.search(before, last)
    return start + (last if announces else len(before))


def _steps(reasoning: str | None, *, cut: bool) -> tuple[str, ...]:
    steps = split_steps(reasoning) if reasoning else ()
    return steps[:-1] if cut else steps


def _problem(text: str, *, start: int, config: CurationConfig, cut: bool, answered: bool) -> str | None:
    if cut:
        return CUT_OFF
    if not text[start:].strip():
        return "nothing was written after the thought"
    if answered or config.answer_format == "none":
        return None
    return f"no final answer (answer_format: {config.answer_format})"


def spans_of(parsed: Parsed, /, text: str) -> list[dict[str, str | int]]:
    """Characters of `text` that hold the parts of `parsed`, as {"name", "start", "end"}, in order.

    `text` is what was parsed or a message made of its parts; a part that is not in it has no span. Names: reasoning
    (in pieces where program or answer stand inside of it), program, answer.
    """
    thought = find_thought(text)
    visible_from = thought.after if thought is not None and thought.after is not None else 0
    fences = tuple(_moved(fence, by=visible_from) for fence in find_fences(text[visible_from:]))
    program = _program_in(text, parsed.program, fences=fences)
    answer = _answer_in(text, parsed.answer, start=visible_from, fences=fences)
    taken = sorted(piece for piece in (program, answer) if piece is not None)
    spans = [("program", program), ("answer", answer)]
    start = _reasoning_at(text, parsed.reasoning, thought=thought)
    if start >= 0 and parsed.reasoning:
        end = start + len(parsed.reasoning)
        for piece in taken:
            if start < piece.end and piece.start < end:
                spans.append(("reasoning", trimmed(text, start, max(start, piece.start))))
                start = piece.end
        spans.append(("reasoning", trimmed(text, start, max(start, end))))
    kept = [(piece.start, piece.end, name) for name, piece in spans if piece is not None and piece.start < piece.end]
    return [{"name": name, "start": start, "end": end} for start, end, name in sorted(kept)]


def _reasoning_at(text: str, reasoning: str | None, *, thought: Thought | None) -> int:
    """Where `reasoning` begins, at first inside of the thought, whose tags may hold its words too; -1 for nowhere."""
    if not reasoning:
        return -1
    inside = text.find(reasoning, thought.inner.start, thought.inner.end) if thought is not None else -1
    return inside if inside >= 0 else text.find(reasoning)


def _program_in(text: str, program: str | None, *, fences: tuple[Fence, ...]) -> Piece | None:
    """The last block of code that is `program`; where there is none, its last occurrence."""
    if not program:
        return None
    for fence in reversed(fences):
        if fence.body.of(text) == program:
            return fence.body
    start = text.rfind(program)
    return Piece(start, start + len(program)) if start >= 0 else None


def _answer_in(text: str, answer: str | None, *, start: int, fences: tuple[Fence, ...]) -> Piece | None:
    """Where the text marks `answer` as its answer, looked for as `parse` does; else its last occurrence that is no part
    of a word or program."""
    if not answer:
        return None
    visible = without(text, _code(fences))[start:]
    for finder in (*AUTO, *FINDERS["choice"], *FINDERS["last_number"], *FINDERS["hashes"]):
        for found in finder(visible):
            words = trimmed(visible, *found.piece)
            if words.end - words.start <= 2 * LONGEST and cleaned(visible, words).of(visible) == answer:
                place = cleaned(visible, words).start + start
                return Piece(place, place + len(answer))
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    for whole in (without(text, fences), text):
        places = [Piece(*match.span()) for match in re.finditer(pattern, whole)]
        if places:
            return places[-1]
    last = text.rfind(answer)
    return Piece(last, last + len(answer)) if last >= 0 else None
