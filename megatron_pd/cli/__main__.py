import sys

from megatron_pd.cli import main

sys.exit(main())
