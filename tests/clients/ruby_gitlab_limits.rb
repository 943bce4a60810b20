#!/usr/bin/env ruby
# frozen_string_literal: true

# Drives the Ruby client (gem gitlab 4.17) against a gateway with a limit. The client raises an error of its own class for
# 429; its caller waits as long as the answer says, which the error holds, and goes on.
# Usage: ruby ruby_gitlab_limits.rb BASE_URL TOKEN REQUESTS

require 'gitlab'

base_url, token, requests = ARGV
client = Gitlab.client(endpoint: "#{base_url}/api/v3", private_token: token)
begun = Process.clock_gettime(Process::CLOCK_MONOTONIC)
waits = 0
Integer(requests).times do |number|
  begin
    raise 'another user' unless client.user.username == 'alice'
  rescue Gitlab::Error::TooManyRequests => e
    raise unless (waits += 1) <= 20 && e.message.include?('429 Too Many Requests')

    sleep Integer(e.instance_variable_get(:@response).headers['retry-after'])
    retry
  end
  puts "ok #{number} after #{(Process.clock_gettime(Process::CLOCK_MONOTONIC) - begun).round(1)}s"
end
