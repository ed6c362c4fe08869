"""What command lines import beside the framework's core; read by the fork server."""

import gc

import tokenizers  # noqa: F401
import transformers  # noqa: F401

import megatron_ext.model_io.compare  # noqa: F401
import megatron_ext.model_io.convert  # noqa: F401
import megatron_ext.upcycling.run  # noqa: F401

gc.freeze()
