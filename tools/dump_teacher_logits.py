#!/usr/bin/env python3
"""`megatron-pd dump` where a Megatron user looks for it: torchrun tools/dump_teacher_logits.py …"""

import sys

from megatron_pd.cli import script

sys.argv.insert(1, "dump")
script()
