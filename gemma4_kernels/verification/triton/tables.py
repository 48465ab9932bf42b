"""Sizes of the programs, and why: data."""

from __future__ import annotations

# Tokens of a tile. 4096 are 8 KiB of bf16; 64 tiles of Gemma's vocabulary, 320 programs for a row and four drafts.
TILE = 4096
TILE_WARPS = 8
# Places that a tile lists: of the 64 largest of a row, a tile of 64 has one; runs of equal scores have room.
LIST = 32
# From a larger top_k on, noise serves better than lists: the sample of the whole row survives most of the time.
LONGEST_TOP_K = 64
# Places that one request's program holds in registers: the lists of 64 tiles.
SCRATCH = 2048
# Tokens of one step of the program that reads a row again.
READ = 512
THRESHOLDS = 4  # of one read: the interval shrinks to a quarter. Eight spill registers on sm_120
FINISH_WARPS = 8
FACT_TILES = 128  # 4096 tiles, of the largest vocabulary, in 32 steps
