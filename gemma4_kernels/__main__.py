"""`python -m gemma4_kernels` is the command `gemma4-kernels`."""

from gemma4_kernels.cli.main import main

raise SystemExit(main())
