"""A picture of what a command prints: FORCE_COLOR=1 COMMAND | python docs/picture_terminal.py PICTURE.svg"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

text = Text.from_ansi(sys.stdin.read().rstrip())
width = max(map(len, text.plain.splitlines()))
console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)
console.print(text)
picture = console.export_svg(title="")
# No fonts from a server: each system has a monospaced one.
Path(sys.argv[1]).write_text(re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL))
