"""Sizes of the programs, and why: data."""

from __future__ import annotations

# Tokens of a tile: 8 of a thread, whose noise takes 90 registers, so that a multiprocessor holds two tiles and more. Gemma's
# vocabulary is 128 tiles, a row and four drafts 640 programs.
TILE = 2048
TILE_WARPS = 8
CHUNK = 128  # tokens that stand together in a tile: 256 bytes, whole lines of a cache
# Places that a tile lists at most and at least. Of the 64 largest of a row, one of Gemma's 128 tiles has one or none, and
# lists 16: runs of equal scores have room.
LIST, SHORTEST_LIST = 64, 8
# From a larger top_k on, noise serves better than lists: the sample of the whole row survives most of the time.
LONGEST_TOP_K = 64
# Places that a program holds in registers: all lists of a row.
SCRATCH = 2048
READ = 512  # tokens of one step of a program that reads a row again; 1024 spill registers
THRESHOLDS = 4  # of one read: the interval shrinks to a quarter. Eight spill registers on sm_120
FINISH_WARPS = 8
FACT_TILES = 128  # tiles of one step over a row's facts


def list_length(tile_count: int) -> int:
    """Places that each of so many tiles lists: a power of two, or 0 where the lists would be too short to decide anything."""
    room = SCRATCH // tile_count
    length = min(LIST, 1 << (room.bit_length() - 1)) if room else 0
    return length if length >= SHORTEST_LIST else 0
