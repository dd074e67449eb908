"""Write the JSON schemas recipes/schema.json and generate_schema.json for editors: python tools/schema.py"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write the schema of the current configuration records."""
    from largekd.config.generate import GenerateConfig
    from largekd.config.schema import json_schema_text, record_schema_text

    generation = record_schema_text(GenerateConfig)
    (CHECKOUT / "recipes" / "generate_schema.json").write_text(generation, encoding="utf-8")
    (CHECKOUT / "recipes" / "schema.json").write_text(json_schema_text(), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    main()
