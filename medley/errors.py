"""Every error that Medley raises on purpose.

MedleyError
    BackboneError   the backbone cannot be built, or is not the one that was meant
    BundleError     a bundle is damaged, or does not fit this backbone
    CapacityError   no free slot is left
    DataError       training or evaluation data cannot be used
    ImageError      one image cannot be used

`code` is a short stable word that programs may test; the text is for people. The service maps
classes to HTTP statuses, the command line prints the text as one line.
"""

from __future__ import annotations

__all__ = [
    "BackboneError",
    "BundleError",
    "CapacityError",
    "DataError",
    "ImageError",
    "MedleyError",
]


class MedleyError(Exception):
    """Base of all; `code` says which case it is."""

    code: str = "medley"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class BackboneError(MedleyError):
    """Raised when a backbone cannot be built or does not offer what Medley needs."""

    code = "backbone"


class BundleError(MedleyError):
    """Raised when a bundle is refused; `problems` lists everything that does not fit."""

    code = "bundle_invalid"

    def __init__(self, problems: list[str], *, code: str | None = None) -> None:
        super().__init__("; ".join(problems), code=code)
        self.problems = problems


class CapacityError(MedleyError):
    """Raised when a task needs more slots than are free."""

    code = "no_slot"


class DataError(MedleyError):
    """Raised when a folder, table or data set cannot be used for training or evaluation."""

    code = "data"


class ImageError(MedleyError):
    """Raised for one image; codes: empty, too_large, too_many_pixels, not_an_image, undecodable."""

    code = "undecodable"
