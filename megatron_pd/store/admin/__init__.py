"""What is done with whole stores: checked, summed up, shown, joined, cut, recoded, as Parquet."""
