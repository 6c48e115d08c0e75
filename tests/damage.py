"""Seeded damage to files: what disks, transfers, editors and strangers do to them."""

import io
import json
import re
import struct
import zipfile
import zlib

NUMBERS = ("", "-1", "0", "1e999", "nan", "-inf", "9" * 30, "0x10", "1_0", "²", "٣", "1.5", "2,5")
WORDS = ("\0", "../../x", "\x1b[31m", "a\tb", "ü\u2028", "<b>", '"', "'", ";", "%s{}")
VALUES = (
    None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), "", "x\ny", [], {}, [[]], {"a": 1},
    ["x"], [[[1, 2], [3]]], "1", [1, None], "é\0", 2**31, 2**63, [-1, 2], [10**6, 10**6],
)  # fmt: skip


def damage(content, source):
    """Bytes with one to four changes that know nothing of the format."""
    found = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at = source.randrange(len(found) + 1)
        size = min(source.choice((1, 2, 4, 16, 200)), len(found) - at)
        other = source.randrange(len(found) + 1)
        match source.randrange(10):
            case 0 | 1 | 2 if at < len(found):
                found[at] ^= 1 << source.randrange(8)
            case 3:
                del found[at:]
            case 4:
                del found[at : at + size]
            case 5:
                found[at:at] = source.randbytes(source.choice((1, 3, 40)))
            case 6:
                found[at:at] = found[other : other + size]
            case 7:
                found[at : at + size] = bytes(size)
            case 8:
                huge = source.choice((0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1))
                found[at : at + 4] = struct.pack(source.choice("<>") + "I", huge)
            case 9:
                found[at : at + size] = source.randbytes(size)
    return bytes(found)


def damage_text(content, source):
    """A text with another number or word in some place, or damaged bytes."""
    text = content.decode()
    places = list(re.finditer(r"[-\d.]+|[^\W\d]+", text))
    if not places or source.random() < 0.3:
        return damage(content, source)
    place = source.choice(places)
    number = place[0][0].isdigit() and source.random() < 0.8
    word = source.choice(NUMBERS if number else WORDS)
    return (text[: place.start()] + word + text[place.end() :]).encode()


def damage_json(content, source):
    """JSON with a value of another kind, or without one; or damaged text."""
    if source.random() < 0.3:
        return damage_text(content, source)
    return json.dumps(damage_value(json.loads(content), source)).encode()


def damage_value(value, source):
    """A value as JSON has them, with another one in some place of it."""
    if not value or not isinstance(value, dict | list) or source.random() < 0.1:
        return source.choice(VALUES)
    changed = value.copy()
    key = source.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if source.random() < 0.15:
        del changed[key]
    else:
        changed[key] = damage_value(value[key], source)
    return changed


def damage_png(content, source):
    """A damaged PNG whose checksums are right all the same."""
    if source.random() < 0.3:
        return damage(content, source)
    found, at, chunks = content[:8], 8, []
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    hit = source.randrange(len(chunks))
    if source.random() < 0.2:
        chunks.insert(source.randrange(len(chunks)), chunks[hit])
    else:
        chunks[hit] = chunks[hit][0], damage(chunks[hit][1], source)
    for kind, body in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        found += struct.pack(">I", len(body)) + kind + body + crc
    return found


def damage_zip(content, source):
    """An archive, such as ``.npz`` and ``.pt`` are, with a damaged member in a sound frame."""
    if source.random() < 0.3:
        return damage(content, source)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = source.choice(list(members))
    if source.random() < 0.1:
        del members[name]
    else:
        members[name] = damage(members[name], source)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return made.getvalue()


def damage_tensors(content, source):
    """A safetensors file with another header, of the right length, or damaged bytes."""
    if source.random() < 0.3:
        return damage(content, source)
    end = 8 + int.from_bytes(content[:8], "little")
    header = damage_json(content[8:end], source)
    return len(header).to_bytes(8, "little") + header + content[end:]
