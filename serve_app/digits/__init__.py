"""The embedded demo: real handwritten digits, a ResNet-18 trained on first use, and a fogged-over lens."""
