"""TensorBoard's event files: records of TensorFlow's, each with an Event in protobuf's wire format.

Only what this program writes is encoded: scalars, and the start of a session. Formats:
tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto and framework/summary.proto.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping

from bipe_jax.workdir import appending, bucket


def _table() -> list[int]:
    """Of CRC-32C (Castagnoli), a byte at a time."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


class EventFile:
    """A new event file in a directory. Every record is written at once; in a bucket, after a while.

    Raises:
      OSError: it cannot be written, also in all methods.
    """

    def __init__(self, directory: str):
        # TensorBoard reads files in the order of their names.
        moment, mine = f"{time.time():.6f}", os.urandom(8).hex()
        name = f"events.out.tfevents.{moment}.{socket.gethostname()}.{mine}"
        path = os.path.join(directory, name)
        if bucket.holds(path):
            self._file = appending.Growing(path)
        else:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._write(_bytes(3, b"brain.Event:2"))  # file_version

    def start(self, step: int) -> None:
        """The start of a session: records of this step and later ones in earlier files do not count."""
        self._write(_number(2, step) + _bytes(7, _number(1, 1)))  # session_log.status = START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The scalars of a step, by name."""
        summary = b""
        for name, value in values.items():
            # A float is stored with 32 bits; of larger ones than these can hold, as infinity.
            single = struct.pack("<f", value if abs(value) < 3.4e38 else value * float("inf"))
            tagged = _bytes(1, name.encode()) + _varint(2 << 3 | 5) + single
            summary += _bytes(1, tagged)
        self._write(_number(2, step) + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = _varint(1 << 3 | 1) + struct.pack("<d", time.time()) + event  # wall_time
        length = struct.pack("<Q", len(event))
        record = memoryview(length + _masked_crc(length) + event + _masked_crc(event))
        while record:
            record = record[self._file.write(record) :]
