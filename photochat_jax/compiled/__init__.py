"""What the compiler says of a training step, without the devices."""
