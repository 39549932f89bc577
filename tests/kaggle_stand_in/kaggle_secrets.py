"""A stand-in for the package `kaggle_secrets` of a Kaggle notebook. The JSON file named by KAGGLE_STAND_IN holds {"secrets": {label: value}}."""

import json
import os


class CredentialError(Exception):
    pass


class BackendError(Exception):
    pass


class UserSecretsClient:
    """Add-ons > Secrets."""

    def get_secret(self, label):
        if not label:
            raise ValueError("Label must be non-empty.")
        with open(os.environ["KAGGLE_STAND_IN"], encoding="utf-8") as file:
            secrets = json.load(file)["secrets"]
        if label not in secrets:
            raise BackendError("Unexpected response from the service. Response: {'errors': ['No user secrets exist for kernel id 1 and label " + label + ".']}")
        return secrets[label]
