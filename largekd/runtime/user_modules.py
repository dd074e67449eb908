"""Python modules that a user's configuration names."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from largekd.errors import ConfigError


def import_user_module(name: str, *, key: str) -> ModuleType:
    """The module of a dotted name, or of the path of a .py file. Errors: ConfigError names `key` and the reason."""
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(f"largekd_user:{path.with_suffix('')}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(
            f"{key}: {name!r} cannot be imported ({type(error).__name__}: {error}); give a dotted module name that "
            "Python finds, or the path of a .py file."
        ) from error
    return module
