"""The tuner: what may be chosen, how it is searched and judged, and where what was chosen is kept. Only optuna's own users are here."""
