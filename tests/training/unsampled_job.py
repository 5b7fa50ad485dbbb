"""Job of the fork server: pre-training whose start reads no row; faults in rows come later."""

from megatron_pd import pretrain
from megatron_pd.train import teacher_data


def main() -> int:
    teacher_data._taught_share = lambda store: 1.0
    return pretrain.main()
