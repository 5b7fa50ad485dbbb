"""How good a checkpoint is: loss and calibration on held-out documents."""
