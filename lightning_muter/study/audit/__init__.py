"""The audit of a study: paired worlds in which every method answers the same requests, attacked as strongly as is known."""
