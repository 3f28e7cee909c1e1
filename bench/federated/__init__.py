"""`gradwire bench federated`: simulations of federated training, their speed and their accuracy."""
