"""What ``halfbyte ui`` takes; the flags are made of these fields. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from halfbyte.deploy.address import is_loopback
from halfbyte.errors import InputError
from halfbyte.options import Options

USER = "halfbyte"
"""Whose password ``--password`` is."""


class UiOptions(Options):
    """Where the page is, for whom, and which folders it may use."""

    root: list[str] | None = Field(
        default=None,
        description="Folder that the page may read and write, without it the working directory; runs are made in the "
        "first one's runs.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen at; any but this machine's own needs a "
        "password.")  # fmt: skip
    port: int = Field(default=7860, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    password: str | None = Field(
        default=None,
        description=f"What users must give, as {USER}; the list of processes shows it, a file does not.",
    )
    auth_file: Path | None = Field(default=None, description="File of users, a line NAME:PASSWORD each.")
    max_upload: ByteSize = Field(default=ByteSize(2 << 30), gt=0, description="Greatest file that may be sent to it.")
    language: Literal["auto", "en", "zh"] = Field(
        default="auto", description="What the page speaks at first; auto: what the browser asks for."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.password is not None and self.auth_file is not None:
            raise ValueError("password and auth_file are two ways for the same: give one of them")
        if not is_loopback(self.host) and self.password is None and self.auth_file is None:
            raise ValueError(
                f"host {self.host} is reached from other machines, so a password is needed: give --auth-file, or "
                "--password, or leave --host away"
            )
        return self

    def users(self) -> dict[str, str]:
        """Return names and passwords; none: nobody is asked.

        Raises:
            InputError: the file cannot be read or has a line that is none, or a password is empty.
        """
        if self.auth_file is None:
            if self.password is None:
                return {}
            if not self.password:
                raise InputError("The password is empty; give one.")
            return {USER: self.password}
        try:
            lines = self.auth_file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The users in {self.auth_file} cannot be read: {error}.") from None
        found: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, colon, password = line.strip().partition(":")
            if not (name and colon and password):
                raise InputError(f"{self.auth_file}, line {number}: write NAME:PASSWORD.")
            found[name] = password
        if not found:
            raise InputError(f"The file {self.auth_file} names no user; write NAME:PASSWORD, one a line.")
        return found
