from megatron_pd.cli import script

script()
