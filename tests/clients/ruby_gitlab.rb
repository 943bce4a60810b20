#!/usr/bin/env ruby
# frozen_string_literal: true

# Drives the Ruby client (gem gitlab 4.17) against tests/backend/gitlab.ru, directly or behind tollgate.
# Usage: ruby ruby_gitlab.rb BASE_URL GOOD_TOKEN BAD_TOKEN LONG_TOKEN
#
# The client sends a token of up to 20 characters as PRIVATE-TOKEN and a longer one as Authorization: Bearer, so both
# kinds are needed to see both roads.

require 'gitlab'

CHECKS = 15
TITLE = 'Überprüfung: 日本語 🚀 a&b=c+d; 100%'

abort "usage: #{$PROGRAM_NAME} BASE_URL GOOD_TOKEN BAD_TOKEN LONG_TOKEN" unless ARGV.size == 4
base_url, good_token, bad_token, long_token = ARGV
abort 'GOOD_TOKEN must have 20 characters at most' if good_token.size > 20
abort 'LONG_TOKEN must have more than 20 characters' if long_token.size <= 20

$passed = 0

def check(name)
  yield
  $passed += 1
  puts "ok #{name}"
rescue StandardError => e
  abort "not ok #{name}: #{e.class}: #{e.message}"
end

def equal(expected, actual)
  raise "expected #{expected.inspect[0, 300]}, got #{actual.inspect[0, 300]}" unless expected == actual
end

# The error must be of that class and carry what the server said.
def refused(error_class, part)
  yield
rescue error_class => e
  raise "#{part.inspect} is not in #{e.message.inspect}" unless e.message.include?(part)
else
  raise "expected #{error_class}, got an answer"
end

connect = ->(token) { Gitlab.client(endpoint: "#{base_url}/api/v3", private_token: token) }
client = connect.call(good_token)
all_ids = (1..253).to_a

check('list has 20 projects') { equal((1..20).to_a, client.projects.map(&:id)) }
check('auto_paginate reaches all projects') { equal(all_ids, client.projects.auto_paginate.map(&:id)) }
check('auto_paginate by 100 reaches all projects') do
  equal(all_ids, client.projects(per_page: 100).auto_paginate.map(&:id))
end
check('next_page follows the link') { equal((21..40).to_a, client.projects.next_page.map(&:id)) }
check('per_page=5000 gives 100') { equal((1..100).to_a, client.projects(per_page: 5000).map(&:id)) }
check('get by encoded path') { equal(1, client.project('group/project').id) }
check('get by encoded path with a dot') { equal(2, client.project('group/dotted.name').id) }
check('create an issue with a UTF-8 title') do
  created = client.create_issue('group/project', TITLE, description: TITLE)
  equal([TITLE, TITLE], [created.title, created.description])
  equal(TITLE, client.issues('group/project').first.title)
end
check('404 is NotFound') { refused(Gitlab::Error::NotFound, '404 Project Not Found') { client.project('group/none') } }
check('400 is BadRequest') do
  refused(Gitlab::Error::BadRequest, '400 (Bad request) "title" not given') { client.create_issue(1, '') }
end
check('bad token is Unauthorized') do
  refused(Gitlab::Error::Unauthorized, '401 Unauthorized') { connect.call(bad_token).projects }
end
check('bad long token is Unauthorized') do
  refused(Gitlab::Error::Unauthorized, '401 Unauthorized') { connect.call("#{long_token}x").projects }
end

long_client = connect.call(long_token)
check('long token is a user') { equal(String, long_client.user.username.class) }
check('long token reaches all projects') { equal(all_ids, long_client.projects.auto_paginate.map(&:id)) }
check('long token creates an issue') { equal(TITLE, long_client.create_issue(3, TITLE).title) }

abort "ran #{$passed} checks, not #{CHECKS}" unless $passed == CHECKS
puts "#{$passed} checks passed"
