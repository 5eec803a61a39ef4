"""Names that users give: of tasks, runs and samples."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
