"""The language of an answer."""

import re
from importlib.util import find_spec

from largekd.config.curation import LanguageFilterConfig
from largekd.curation.filters import EachAlone, Filter, Judgement
from largekd.curation.records import Curated
from largekd.errors import ConfigError

# Code, formulas, tags and numbers are in no language. Bounded, since an opening mark may have no closing one.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|\$\$.{0,2000}?\$\$|\$[^$\n]*\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|`[^`\n]*`|</?\w+>|\\\w+|\d[\d.,:/]*",
    re.DOTALL,
)
_WORD = re.compile(r"[^\W\d_]+")


def prose(text: str) -> str:
    """`text` without code blocks, formulas, tags and numbers."""
    return " ".join(_NOT_PROSE.sub(" ", text).split())


def language_filter(config: LanguageFilterConfig) -> Filter:
    """Score `probability`, of the configured languages together; the note names the likeliest language.

    Errors: ConfigError where the detector is not installed, or does not know a language.
    """
    if find_spec("py3langid") is None:
        raise ConfigError(
            "curation.filters: kind 'language' needs the package py3langid; install largekd[factory], or remove the "
            "filter."
        )
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(config.languages) - set(detector.labels))
    if unknown:
        raise ConfigError(
            f"curation.filters: languages {', '.join(unknown)}: not known to the detector; its codes are "
            f"{', '.join(sorted(detector.labels))}."
        )

    def one(row: Curated) -> Judgement:
        text = prose(row.written.text)
        # Languages without spaces have few and long words.
        if len(_WORD.findall(text)) < config.min_words and len(text) < 8 * config.min_words:
            return Judgement()
        ranking = detector.rank(text)
        # Seven digits: the last ones differ between machines.
        probability = round(sum(share for code, share in ranking if code in config.languages), 7)
        refused = "min_probability" if probability < config.min_probability else None
        return Judgement({"probability": probability}, refused, note=f"likely {ranking[0][0]}")

    return EachAlone(one)
