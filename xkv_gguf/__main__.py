"""``python -m xkv_gguf`` is the command line."""

from .cli import main

raise SystemExit(main())
