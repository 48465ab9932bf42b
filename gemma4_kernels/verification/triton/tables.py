"""Sizes of the programs, and why: data."""

from __future__ import annotations

# Tokens of a tile: 8 of a thread, whose noise takes 90 registers, so that a multiprocessor holds two tiles and more. Gemma's
# vocabulary is 128 tiles, a row and four drafts 640 programs.
TILE = 2048
TILE_WARPS = 8
CHUNK = 128  # tokens that stand together in a tile: 256 bytes, whole lines of a cache
# Places that a tile lists. Of the 64 largest of a row a tile of 128 has one or none; runs of equal scores have room.
LIST = 16
# From a larger top_k on, noise serves better than lists: the sample of the whole row survives most of the time.
LONGEST_TOP_K = 64
# Places that a program holds in registers: the lists of 128 tiles.
SCRATCH = 2048
READ = 512  # tokens of one step of a program that reads a row again; 1024 spill registers
THRESHOLDS = 4  # of one read: the interval shrinks to a quarter. Eight spill registers on sm_120
FINISH_WARPS = 8
FACT_TILES = 128  # tiles of one step over a row's facts
