"""The few shapes that networks share: plain, pyramid, decoder. May import nn."""
