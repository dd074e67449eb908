"""Engine: DeepSpeed's train and frozen engines and the one place where their configuration is merged."""
