"""From trained weights to a version that can be trusted: metrics, calibration, export, report."""
