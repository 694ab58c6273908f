"""The lab: small models, corpora and tasks that every machine has, some with known answers."""
