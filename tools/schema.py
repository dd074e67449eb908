"""Write recipes/schema.json, the JSON schema with which editors check recipes: python tools/schema.py"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write the schema of the current configuration records."""
    from largekd.config.schema import json_schema_text

    (CHECKOUT / "recipes" / "schema.json").write_text(json_schema_text(), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    main()
