"""A picture of what a command prints: python docs/picture_terminal.py PICTURE.svg COMMAND..."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

picture, *command = sys.argv[1:]
terminal = os.environ | {"FORCE_COLOR": "1", "COLUMNS": "150"}
done = subprocess.run(command, env=terminal, stdout=subprocess.PIPE, text=True, check=True)
text = Text.from_ansi(f"$ {' '.join(command)}\n{done.stdout.rstrip()}")
width = max(len(line.rstrip()) for line in text.plain.splitlines())
console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)
console.print(text, overflow="crop", no_wrap=True)
# No fonts from a server: each system has a monospaced one.
drawn = re.sub(r"@font-face \{.*?\}\n", "", console.export_svg(title=""), flags=re.DOTALL)
Path(picture).write_text(drawn)
