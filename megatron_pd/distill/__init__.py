"""Pre-training distillation itself: configuration, losses on sparse rows, schedules. torch only."""
