"""megatron_ext: a training framework for Mixture-of-Experts language models on megatron-core."""

import warnings

from megatron_ext.quiet import quieten_interrupts, quieten_loggers

__version__ = "0.1.0"

# megatron-core warns, at import, that Apex and Transformer Engine are missing: here that is a choice, not a fault. And
# it calls collectives under names that newer torch deprecates: nothing a user of either could mend.
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
quieten_loggers()
quieten_interrupts()
