"""The quality study: what Training-Free Bayesianization does to accuracy, calibration and uncertainty, and against what.

``python -m bench.quality.run`` trains and predicts (a GPU), ``python -m bench.quality.report`` measures and draws (anywhere).
"""
