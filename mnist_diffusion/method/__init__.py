"""The method: network, noising process, objectives, guidance, distillation."""
