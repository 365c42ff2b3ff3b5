"""Making the predictors that ``lowrank`` asks: training them on text, and importing those of others."""
