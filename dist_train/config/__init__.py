"""The configuration of a run: its keys (schema.py), how it is loaded (load.py), the objects it names.

Imports nothing else of ours, and not torch: a typo is reported before anything heavy is loaded.
"""

from dist_train.config.changes import changes
from dist_train.config.errors import RunError, UserError, counted, nearest, printable
from dist_train.config.every import Every, parse_seconds
from dist_train.config.load import (
    completed,
    from_mapping,
    is_override,
    load,
    load_words,
    to_mapping,
    to_yaml,
)
from dist_train.config.objects import GIVEN, construct, given_name, import_object, with_given
from dist_train.config.schema import Config, get
from dist_train.config.stopping import StopWhen
from dist_train.config.trust import from_file, only

__all__ = [
    "GIVEN",
    "Config",
    "Every",
    "RunError",
    "StopWhen",
    "UserError",
    "changes",
    "completed",
    "construct",
    "counted",
    "from_file",
    "from_mapping",
    "get",
    "given_name",
    "import_object",
    "is_override",
    "load",
    "load_words",
    "nearest",
    "only",
    "parse_seconds",
    "printable",
    "to_mapping",
    "to_yaml",
    "with_given",
]
