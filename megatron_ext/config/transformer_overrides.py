"""What is known of the fields of megatron-core's TransformerConfig that `model.transformer_overrides` may set."""

TRAINING_ONLY = frozenset(
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion "
    "async_tensor_model_parallel_allreduce barrier_with_L1_time batch_p2p_sync bias_activation_fusion "
    "bias_dropout_fusion config_logger_dir cpu_offloading cpu_offloading_activations cpu_offloading_num_layers "
    "cpu_offloading_weights cross_entropy_fusion_impl cross_entropy_loss_fusion deallocate_pipeline_outputs "
    "defer_embedding_wgrad_compute delay_wgrad_compute deterministic_mode distribute_saved_activations "
    "gradient_accumulation_fusion masked_softmax_fusion memory_efficient_layer_norm "
    "microbatch_group_size_per_vp_stage moe_deepep_num_sms moe_layer_recompute "
    "moe_permute_fusion moe_shared_expert_overlap "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage overlap_moe_expert_parallel_comm "
    "overlap_p2p_comm_warmup_flush persist_layer_norm pipeline_model_parallel_layout tp_comm_atomic_ag "
    "tp_comm_atomic_rs tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag "
    "tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
    "tp_comm_split_ag tp_comm_split_rs wgrad_deferral_limit".split()
)
"""Overrides of megatron-core's fields that leave the logits of a trained model alone."""
