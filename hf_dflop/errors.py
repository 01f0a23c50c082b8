"""The errors that hf_dflop raises on purpose.

    Exception
    └── DflopError
        ├── DatasetError(ValueError)      a row, a column or an image of the dataset is not usable
        │   ├── ShapeMismatchError        annotated shapes differ from what the processor really gives
        │   └── StreamError               a stream broke while it was read, such as when the connection was lost
        ├── ProcessorError(ValueError)    the processor cannot count tokens from image sizes
        ├── ModelError(ValueError)        the model has no vision encoder, or its structure is not understood
        ├── BalanceError(ValueError)      costs, caps or bucket counts that no assignment can satisfy
        ├── PlanError(ValueError)         a plan that contradicts itself, or for which nothing fits
        └── TrainerError(ValueError)      a setting of Trainer or Accelerator under which a run would not be exact

Every message states the value found, the rule that it breaks, and what to change.
"""


class DflopError(Exception):
    """Base of all errors that hf_dflop raises on purpose."""


class DatasetError(DflopError, ValueError):
    """A row, a column or an image of the dataset is not usable."""


class ShapeMismatchError(DatasetError):
    """The annotated shapes of a sample differ from what the processor really gives for it."""


class StreamError(DatasetError):
    """A stream broke while it was read."""


class ProcessorError(DflopError, ValueError):
    """The processor cannot count tokens from image sizes."""


class ModelError(DflopError, ValueError):
    """The model has no vision encoder, or its structure is not understood."""


class BalanceError(DflopError, ValueError):
    """Costs, caps or bucket counts that no assignment can satisfy."""


class PlanError(DflopError, ValueError):
    """A plan that contradicts itself, or a model and cluster for which no plan fits."""


class TrainerError(DflopError, ValueError):
    """A setting of Trainer or Accelerator under which a run would change what the optimizer sees."""
