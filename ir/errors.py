"""The error classes, for the layers below ``compiler``; see ``luthier.errors``, where they are written.

They live there because ``luthier.load`` must raise them on a machine where ``luthier.ir`` cannot be imported.
"""

from luthier.errors import (
    ArtifactError,
    CompilationError,
    InputError,
    InvalidModel,
    KernelError,
    LuthierError,
    OutOfMemoryError,
    QuantizationError,
    ScheduleError,
    SettingError,
    ShapeError,
    TargetError,
    TuningError,
    TypeMismatch,
    UnsupportedOperator,
    VerificationError,
)

__all__ = [
    "ArtifactError",
    "CompilationError",
    "InputError",
    "InvalidModel",
    "KernelError",
    "LuthierError",
    "OutOfMemoryError",
    "QuantizationError",
    "ScheduleError",
    "SettingError",
    "ShapeError",
    "TargetError",
    "TuningError",
    "TypeMismatch",
    "UnsupportedOperator",
    "VerificationError",
]
