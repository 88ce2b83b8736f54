"""The endpoints' HTTP side: tokens, limits, errors, codecs, and the app that ties them to what scores."""
