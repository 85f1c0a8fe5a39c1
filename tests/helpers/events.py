"""Reads what TensorBoard would."""

import struct

from tensorboardX.proto.event_pb2 import Event


def read_events(folder):
    """All events in the files of a folder."""
    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its CRC, the event, its CRC
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events
