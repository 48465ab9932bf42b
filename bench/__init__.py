"""What validation, benchmarks and tests share: the list of cases, the error rule, and scripts that time things.

cases.py    every case a kernel must hold, as data; a case's string is its identity and its seed
inputs.py   tensors with the statistics of Gemma 4
errors.py   how far a kernel may be from the reference
"""
