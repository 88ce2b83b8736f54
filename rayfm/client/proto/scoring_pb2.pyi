from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreStudentRequest(_message.Message):
    __slots__ = ("model", "user", "candidates")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    model: str
    user: bytes
    candidates: bytes
    def __init__(self, model: _Optional[str] = ..., user: _Optional[bytes] = ..., candidates: _Optional[bytes] = ...) -> None: ...

class ScoreTeacherRequest(_message.Message):
    __slots__ = ("teacher", "version", "rows", "representation")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATION_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    version: str
    rows: bytes
    representation: bool
    def __init__(self, teacher: _Optional[str] = ..., version: _Optional[str] = ..., rows: _Optional[bytes] = ..., representation: _Optional[bool] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("version", "predictions")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    predictions: bytes
    def __init__(self, version: _Optional[str] = ..., predictions: _Optional[bytes] = ...) -> None: ...
