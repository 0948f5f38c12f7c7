"""The errors of training; each message is one sentence with the cause, the value and the remedy."""


class TrainingError(RuntimeError):
    """The run cannot continue; the base of the others."""


class ConfigError(TrainingError):
    """A setting that is not allowed."""


class DataError(TrainingError):
    """Images that are missing, unusable or too few, or a request that they cannot meet."""


class CheckpointError(TrainingError):
    """A checkpoint or a run folder that cannot be used."""


class ReleaseError(TrainingError):
    """The trained model could not be released; its run is saved, so that resuming only tests it."""


class VerificationError(TrainingError):
    """The saved model does not answer as the trained one did."""


class TrackingError(TrainingError):
    """MLflow cannot store what the record of a run says."""
